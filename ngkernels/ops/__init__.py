"""The ops: schema, checks, fake, autograd and dispatch of each, and the public function."""
