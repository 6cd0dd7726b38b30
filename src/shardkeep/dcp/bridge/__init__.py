"""Between torch's protocol of planners and storage, and the engine."""
