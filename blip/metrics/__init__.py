"""The official numbers, from texts, answers and scores; no model, no torch, nothing fetched.

captions   BLEU, ROUGE-L, CIDEr-D, METEOR and SPICE as COCO's evaluation has them
ptb        the words of a caption as that evaluation sees them
vqa        VQA's accuracy with its normalisation of answers, and the file for its test server
ranking    VisDial: MRR, R@k, mean rank, NDCG
rates      shares, F1 and areas under the ROC curve with their intervals
"""
