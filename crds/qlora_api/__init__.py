"""The contract: the custom resource and the documents that the operator and the trainer exchange."""
