"""What the end-to-end tests stand on: real servers, real schedulers, and what the probe saw in them."""
