"""Many users: the batch on Ray and the adapter store."""
