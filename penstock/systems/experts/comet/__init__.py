"""COMET: cardinality-constrained mixture of experts with trees and local search."""
