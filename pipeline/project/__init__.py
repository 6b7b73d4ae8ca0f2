"""A project of one's own: written by `refcache new`, looked over by `refcache doctor`."""
