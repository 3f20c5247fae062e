"""An image folder becomes batches."""
