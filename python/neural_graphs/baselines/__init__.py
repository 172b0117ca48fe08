"""What this library is compared with: the published operations, on other libraries."""
