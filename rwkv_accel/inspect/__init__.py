"""Says what a checkpoint, an adapter, a save or a run is."""
