"""`HNSW` as a vector store of other frameworks: `langchain` and `llama_index`, each behind the extra of its name.

documents   what both keep beside the vectors: a text id and a content for each
"""
