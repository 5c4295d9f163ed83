"""What the compiler makes of each kernel, for GPUs that need not be there."""
