"""The engine: `wrap`, the compression mode, and checkpointing with coded inputs."""
