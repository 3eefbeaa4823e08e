"""Documents as token shards, packed into rows and read in an order that any number of processes share."""
