"""Finished runs to TensorBoard, Weights & Biases and MLflow, through their own libraries."""
