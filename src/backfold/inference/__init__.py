"""Running a pretrained energy over many images: vectors and scores, in parts that survive."""
