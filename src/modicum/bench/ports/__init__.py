"""One file per port: what one measurement of its methods is. See `modicum.bench.harness`."""
