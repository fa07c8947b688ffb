"""What a configuration will cost, before any of it is paid: parameters, bytes, FLOPs, time."""
