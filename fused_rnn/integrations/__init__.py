"""Adapters to libraries that run recurrent layers in ways of their own. Import the one of the library that you use."""
