"""Sentences for the demo corpus: a small grammar in eleven languages, written for this repository.

A sentence is subject + predicate + optional place + optional time; within a language every combination is
grammatical, so four short lists give several thousand sentences. What is said does not matter to the systems
that are trained; that the phonemes are varied does.
"""

import numpy as np

# language: (subjects, predicates, places, times)
GRAMMAR: dict[str, tuple[list[str], list[str], list[str], list[str]]] = {
    "en": (
        ["the young gardener", "my oldest cousin", "a tired musician", "our new neighbour",
         "the quiet engineer", "somebody from the village", "the baker's daughter", "an honest judge",
         "the ship's cook", "Uncle George"],
        ["counted seventeen green apples", "repaired the broken window", "was reading a thick book",
         "wrote four long letters", "showed us the shortest path", "forgot both blue umbrellas",
         "painted the wooden chairs yellow", "boiled water for everybody", "pushed the heavy cart uphill",
         "could hear the geese fly over", "threw a thousand pebbles", "joked about the weather"],
        ["behind the old railway station", "in the narrow kitchen", "near the edge of the forest",
         "on the third floor", "beside a frozen lake", "under the stone bridge",
         "at the far end of the market", "outside the theatre"],
        ["last Thursday", "before breakfast", "while it was raining", "every other evening",
         "a few years ago", "shortly after midnight", "during the summer holidays"],
    ),
    "de": (
        ["die junge Ärztin", "mein kleiner Bruder", "ein alter Fischer", "unsere Nachbarin",
         "der müde Lehrer", "jemand aus dem Dorf", "der Sohn des Bäckers", "eine fröhliche Köchin"],
        ["zählte sieben grüne Äpfel", "suchte den verlorenen Schlüssel", "schrieb zwei lange Briefe",
         "kochte eine heiße Suppe", "erzählte eine seltsame Geschichte", "reparierte das kaputte Fahrrad",
         "hörte leise Musik", "zeichnete ein großes Pferd", "brachte frisches Brot",
         "wusch die schwarzen Schuhe"],
        ["hinter dem Bahnhof", "in der engen Küche", "am Rand des Waldes", "neben der Brücke",
         "auf dem Marktplatz", "vor dem Theater", "im dritten Stock"],
        ["am letzten Donnerstag", "vor dem Frühstück", "während des Regens", "fast jeden Abend",
         "kurz nach Mitternacht", "in den Sommerferien"],
    ),
    "es": (
        ["la joven doctora", "mi hermano menor", "un viejo pescador", "nuestra vecina",
         "el maestro cansado", "alguien del pueblo", "el hijo del panadero", "una cocinera alegre"],
        ["contaba siete manzanas verdes", "buscaba la llave perdida", "escribió dos cartas largas",
         "preparó una sopa caliente", "contó una historia extraña", "arregló la bicicleta rota",
         "escuchaba música en voz baja", "dibujó un caballo grande", "trajo pan fresco",
         "lavó los zapatos negros"],
        ["detrás de la estación", "en la cocina estrecha", "cerca del bosque", "junto al puente",
         "en la plaza mayor", "delante del teatro", "en el tercer piso"],
        ["el jueves pasado", "antes del desayuno", "mientras llovía", "casi todas las noches",
         "poco después de medianoche", "durante las vacaciones"],
    ),
    "fr": (
        ["la jeune doctoresse", "mon petit frère", "un vieux pêcheur", "notre voisine",
         "le professeur fatigué", "quelqu'un du village", "le fils du boulanger", "une cuisinière joyeuse"],
        ["comptait sept pommes vertes", "cherchait la clé perdue", "écrivait deux longues lettres",
         "préparait une soupe chaude", "racontait une histoire étrange", "réparait le vélo cassé",
         "écoutait une musique douce", "dessinait un grand cheval", "apportait du pain frais",
         "lavait les chaussures noires"],
        ["derrière la gare", "dans la cuisine étroite", "au bord de la forêt", "près du pont",
         "sur la place du marché", "devant le théâtre", "au troisième étage"],
        ["jeudi dernier", "avant le petit déjeuner", "pendant la pluie", "presque tous les soirs",
         "peu après minuit", "pendant les vacances"],
    ),
    "it": (
        ["la giovane dottoressa", "mio fratello minore", "un vecchio pescatore", "la nostra vicina",
         "il maestro stanco", "qualcuno del paese", "il figlio del fornaio", "una cuoca allegra"],
        ["contava sette mele verdi", "cercava la chiave perduta", "scriveva due lunghe lettere",
         "preparava una zuppa calda", "raccontava una storia strana", "riparava la bicicletta rotta",
         "ascoltava musica a bassa voce", "disegnava un grande cavallo", "portava il pane fresco",
         "lavava le scarpe nere"],
        ["dietro la stazione", "nella cucina stretta", "vicino al bosco", "accanto al ponte",
         "in mezzo alla piazza", "davanti al teatro", "al terzo piano"],
        ["giovedì scorso", "prima di colazione", "mentre pioveva", "quasi ogni sera",
         "poco dopo mezzanotte", "durante le vacanze"],
    ),
    "pt": (
        ["a jovem doutora", "meu irmão mais novo", "um velho pescador", "nossa vizinha",
         "o professor cansado", "alguém da aldeia", "o filho do padeiro", "uma cozinheira alegre"],
        ["contava sete maçãs verdes", "procurava a chave perdida", "escreveu duas cartas longas",
         "preparou uma sopa quente", "contou uma história estranha", "consertou a bicicleta quebrada",
         "ouvia música baixinho", "desenhou um cavalo grande", "trouxe pão fresco",
         "lavou os sapatos pretos"],
        ["atrás da estação", "na cozinha estreita", "perto da floresta", "ao lado da ponte",
         "na praça do mercado", "na frente do teatro", "no terceiro andar"],
        ["na quinta-feira passada", "antes do café da manhã", "enquanto chovia", "quase todas as noites",
         "pouco depois da meia-noite", "durante as férias"],
    ),
    "nl": (
        ["de jonge dokter", "mijn kleine broer", "een oude visser", "onze buurvrouw", "de vermoeide leraar",
         "iemand uit het dorp", "de zoon van de bakker", "een vrolijke kok"],
        ["telde zeven groene appels", "zocht de verloren sleutel", "schreef twee lange brieven",
         "kookte een warme soep", "vertelde een vreemd verhaal", "repareerde de kapotte fiets",
         "luisterde naar zachte muziek", "tekende een groot paard", "bracht vers brood",
         "poetste de zwarte schoenen"],
        ["achter het station", "in de smalle keuken", "aan de rand van het bos", "naast de brug",
         "op het marktplein", "voor het theater", "op de derde verdieping"],
        ["vorige donderdag", "voor het ontbijt", "tijdens de regen", "bijna elke avond",
         "kort na middernacht", "in de zomervakantie"],
    ),
    "sv": (
        ["den unga läkaren", "min lillebror", "en gammal fiskare", "vår granne", "den trötta läraren",
         "någon från byn", "bagarens son", "en glad kock"],
        ["räknade sju gröna äpplen", "letade efter nyckeln", "skrev två långa brev", "kokade en varm soppa",
         "berättade en konstig historia", "lagade den trasiga cykeln", "lyssnade på tyst musik",
         "ritade en stor häst", "köpte färskt bröd", "putsade de svarta skorna"],
        ["bakom stationen", "i det trånga köket", "nära skogen", "bredvid bron", "på torget",
         "framför teatern", "på tredje våningen"],
        ["i torsdags", "före frukosten", "medan det regnade", "nästan varje kväll", "strax efter midnatt",
         "under sommarlovet"],
    ),
    "pl": (
        ["młody lekarz", "mój mały brat", "stary rybak", "nasz sąsiad", "zmęczony nauczyciel",
         "ktoś ze wsi", "syn piekarza", "wesoły kucharz"],
        ["liczył zielone jabłka", "szukał zgubionego klucza", "pisał dwa długie listy",
         "gotował gorącą zupę", "opowiadał dziwną historię", "naprawiał zepsuty rower",
         "słuchał cichej muzyki", "rysował dużego konia", "przyniósł świeży chleb", "czyścił czarne buty"],
        ["za dworcem", "w ciasnej kuchni", "na skraju lasu", "obok mostu", "na rynku", "przed teatrem",
         "na trzecim piętrze"],
        ["w zeszły czwartek", "przed śniadaniem", "podczas deszczu", "prawie co wieczór",
         "krótko po północy", "w czasie wakacji"],
    ),
    "fi": (
        ["nuori lääkäri", "pikkuveljeni", "vanha kalastaja", "naapurimme", "väsynyt opettaja",
         "joku kylästä", "leipurin poika", "iloinen kokki"],
        ["laski vihreitä omenoita", "etsi kadonnutta avainta", "kirjoitti pitkää kirjettä",
         "keitti kuumaa keittoa", "kertoi outoa tarinaa", "korjasi rikkinäistä pyörää",
         "kuunteli hiljaista musiikkia", "piirsi suurta hevosta", "toi tuoretta leipää",
         "pesi mustia kenkiä"],
        ["aseman takana", "ahtaassa keittiössä", "metsän reunassa", "sillan vieressä", "torilla",
         "teatterin edessä", "kolmannessa kerroksessa"],
        ["viime torstaina", "ennen aamiaista", "sateen aikana", "melkein joka ilta",
         "pian puolenyön jälkeen", "kesäloman aikana"],
    ),
    "id": (
        ["dokter muda itu", "adik laki-laki saya", "seorang nelayan tua", "tetangga kami",
         "guru yang lelah itu", "seseorang dari desa", "anak tukang roti", "juru masak yang gembira"],
        ["menghitung tujuh apel hijau", "mencari kunci yang hilang", "menulis dua surat panjang",
         "memasak sup panas", "menceritakan kisah yang aneh", "memperbaiki sepeda yang rusak",
         "mendengarkan musik lembut", "menggambar kuda besar", "membawa roti segar",
         "mencuci sepatu hitam"],
        ["di belakang stasiun", "di dapur yang sempit", "di tepi hutan", "di samping jembatan", "di pasar",
         "di depan gedung teater", "di lantai tiga"],
        ["hari Kamis lalu", "sebelum sarapan", "ketika hujan turun", "hampir setiap malam",
         "tidak lama setelah tengah malam", "selama liburan"],
    ),
}  # fmt: skip


def sentences(rng: np.random.Generator, *, language: str, num_chars: int) -> str:
    """Text of about `num_chars` characters: whole sentences, made to fit by their optional parts.

    `language` is a key of `GRAMMAR`; the same state of `rng` gives the same text.
    """
    subjects, predicates, places, times = GRAMMAR[language]
    text = ""
    while True:
        subject, predicate, place, time = (str(rng.choice(part)) for part in (subjects, predicates, places, times))
        core = f"{subject} {predicate}"
        choices = [core, f"{core} {place}", f"{core} {time}", f"{core} {place} {time}"]
        distance, sentence = min((abs(len(text) + len(choice) + 2 - num_chars), choice) for choice in choices)
        if text and distance >= abs(len(text) - num_chars):
            return text.strip()
        text += f" {sentence[0].upper()}{sentence[1:]}."
