"""How much memory training needs: what is asked of it, the bytes of each pass, and their sum."""
