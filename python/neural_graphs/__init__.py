"""Neural-graph models over the ngkernels engine: builders, models, data, tasks."""
