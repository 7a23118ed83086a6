"""The engine: `wrap`, the compression mode for torch functions, and checkpointing with coded
inputs."""
