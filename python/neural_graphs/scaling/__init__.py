"""The memory-scaling study: the largest input network that each method trains within a memory budget."""
