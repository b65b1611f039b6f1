"""The endpoint: schema, recommender and the Ray Serve application.

`from ray import serve` hides this package's name, so modules here import one another in full:
`from serve.schema import RecommendRequest`.
"""
