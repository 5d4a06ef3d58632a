"""What kernel TLS costs and where it wins: `python -m benchmarks`, or `make bench`."""
