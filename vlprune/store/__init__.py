"""What runs leave on the disk: whole files or none, under keys of all that they depend on."""
