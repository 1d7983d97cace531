"""Tools of the calibrated methods: plain functions on fp32 tensors, one tool a file; methods put them together."""
