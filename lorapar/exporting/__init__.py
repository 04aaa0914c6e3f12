"""Stage 6: the finished adapter, and the merged model."""
