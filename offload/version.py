"""The version of the toolkit, in a file of its own: what asks for it need not import the whole package."""

VERSION = "0.1.0"
