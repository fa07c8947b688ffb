"""Who is personalised: records, readers of real formats, splits, and the embedded PersonaWorld."""
