"""The model: tables, scoring, top-K search, pooling and the click-through-rate models. Imports `schemas` alone."""
