"""How fast qprune is: pytest-benchmark cases (`pytest benchmarks --benchmark-only`) and one table (`python -m benchmarks`)."""
