"""What tests share and is none: references, models, and ranks that are threads or processes."""
