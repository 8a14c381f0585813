"""The version of lem, and nothing else: read by the build without importing the package."""

VERSION = "0.1.0"
