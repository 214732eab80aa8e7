"""The jobs, side by side: none imports another but `demo`; what they share is in `common`."""
