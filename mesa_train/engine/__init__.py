"""The engine: `wrap`, the mode that intercepts torch functions, and checkpointing with coded inputs."""
