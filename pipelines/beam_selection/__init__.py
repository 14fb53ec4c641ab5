"""A selection over more rows than memory holds, as one Beam job; the functions are those of the path in memory."""
