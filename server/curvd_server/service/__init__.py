"""The methods of the contract: one short method per RPC."""
