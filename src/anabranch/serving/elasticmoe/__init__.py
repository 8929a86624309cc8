"""ElasticMoE: a running expert parallel server that grows and shrinks by a few devices, without downtime and without loading twice."""
