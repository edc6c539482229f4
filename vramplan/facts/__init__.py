"""What is true before any run: models, devices, hosts, number formats."""
