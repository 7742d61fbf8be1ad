"""Many requests from a file, answered into a folder: by the server's own application, without a socket."""
