"""The list of attacks on a server, and what runs it: `make attack`. Loopback only, bounded in time and in count."""
