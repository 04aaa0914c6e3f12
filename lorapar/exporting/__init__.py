"""The finished adapter, and the merged model."""
