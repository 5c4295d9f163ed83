"""The model of the limit of a cell, and its constants, published and measured."""
