"""What changes or watches training. Each is a node `callbacks.<name>` of the configuration."""
