"""Jobs that write a checkpoint shard by shard: continued after a stop, shared by processes."""
