"""An HTTP server of embeddings and scores, of the extra `serve`: the routes of
text-embeddings-inference, and those of OpenAI and Cohere for the same."""
