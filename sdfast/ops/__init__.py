"""One folder per operation: public function, schema and autograd, reference, kernels."""
