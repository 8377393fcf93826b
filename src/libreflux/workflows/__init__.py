"""What a user wants done, one module each: options in, a result out, progress by a callback; nothing prints."""
