"""What is saved of a tensor for the backward: stashes, their lineage, the recorder and CPU offloading."""
