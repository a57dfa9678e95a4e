"""Guards for agent frameworks: one module a framework, imported only where it is used."""
