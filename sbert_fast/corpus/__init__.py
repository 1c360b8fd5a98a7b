"""Whole corpora on one machine: inputs cut into shards, one output file a shard, runs that go on
after they were killed, with the bytes of a run that never was."""
