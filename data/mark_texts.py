"""What watermarks say: words, digits, addresses, dates, copyright lines and random characters of five scripts.

The words are short and ordinary; a network shall learn what overlaid text looks like, not certain phrases, which is
also why a part of the texts are random characters.
"""

import numpy as np

WORDS = {
    "latin": (
        "sample|preview|do not copy|draft|proof|confidential|copyright|watermark|stock photo|for review only|"
        "demo version|not for sale|all rights reserved|private|specimen|photography|studio|gallery|archive|original|"
        "unlicensed|property of|by permission|internal use|evaluation copy|image bank|morning light|north harbour|"
        "blue river|silver lake|green hill|paper boat|old bridge|summer road|wild garden|red door|café|façade|"
        "muster|entwurf|échantillon|épreuve|muestra|borrador|campione|bozza|amostra|wzór|örnek|ukázka"
    ),
    "chinese": (
        "样图|预览|请勿复制|版权所有|禁止转载|仅供参考|内部资料|水印|图片样本|摄影作品|原创|测试版|试用版|草稿|机密|"
        "未经授权|摄影|工作室|图库|春天|山水|城市|晨光|花园|北方|海边|旅行|记忆|阳光|风景|老街|故乡|远方|"
        "版權所有|禁止轉載|樣圖|攝影|請勿複製|圖片|風景|預覽"
    ),
    "japanese": (
        "見本|サンプル|複写禁止|転載禁止|プレビュー|無断転載禁止|下書き|写真|試し版|著作権|確認用|社外秘|ギャラリー|"
        "スタジオ|フォト|春の空|山と海|朝の光|ひかり|さくら|みずうみ|古い橋|夏の道|風景|思い出|そら|はなび|東京|"
        "おためし|禁複製|見るだけ|テスト"
    ),
    "korean": (
        "견본|샘플|복사 금지|미리보기|무단 전재 금지|저작권|초안|대외비|사진|시험판|원본|워터마크|배포 금지|확인용|"
        "스튜디오|갤러리|봄날|바다|아침 햇살|하늘|산과 강|오래된 다리|여름 길|풍경|추억|도시|서울|꽃밭|내부 자료|"
        "평가용|그림|빛"
    ),
    "cyrillic": (
        "образец|предпросмотр|не копировать|черновик|все права защищены|копия|проба|водяной знак|фото|архив|студия|"
        "оригинал|для служебного пользования|не для продажи|галерея|съёмка|утро|северный ветер|синяя река|старый мост|"
        "летняя дорога|тихий сад|город|чертёж|зразок|попередній перегляд|узор|пример|снимка|горы|море|весна"
    ),
}
_WORDS = {script: words.split("|") for script, words in WORDS.items()}
SCRIPTS = tuple(WORDS)

# Common characters; any other that the font has would do.
_LETTERS = {
    "latin": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz0123456789-&",
    "chinese": (
        "的一是不了人我在有他这为之大来以个中上们到说国和地也子时道出而要于就下得可你年生自会那后能对着事其里所去行过家十用发天如"
        "然作方成者多日都三小军二无同么经法当起与好看学进种将还分此心前面又定见只主没公从今回很己最但现长由两手美正高水光明山风花"
        "春秋书画图云月海石木金火土东西南北"
    ),
    "japanese": (
        "あいうえおかきくけこさしすせそたちつてとなにぬねのはひふへほまみむめもやゆよらりるれろわをんがぎぐげござじずぜぞだでどばびぶべぼぱぴぷぺぽ"
        "アイウエオカキクケコサシスセソタチツテトナニヌネノハヒフヘホマミムメモヤユヨラリルレロワン"
        "日本人大年月中国学生先行時間前後見上下左右東西南北山川海空花木雨雪風光写真水火金土町村"
    ),
    "korean": (
        "가나다라마바사아자차카타파하고노도로모보소오조초코토포호구누두루무부수우주추쿠투푸후기니디리미비시이지치키티피히"
        "강산한국사람말글달별물불꽃봄여름겨울길집문책손눈귀입빛밤낮앞뒤위아래동서남북"
    ),
    "cyrillic": "АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯабвгдеёжзийклмнопрстуфхцчшщъыьэюяабвгдежзийклмнопрстуфхцчшщыьэюя",
}
SPACED = ("latin", "cyrillic", "korean")  # scripts that put spaces between words
_NAMES = "Ana Berg|J. Moreau|Lena K.|P. Novak|Mira Sol|T. Okafor|Elm & Oak|Nordlicht|Studio 7|Casa Luz|R. Aydin|Ines V."
_SITES = "photo|pixel|image|stock|studio|press|light|view|frame|north|river|atlas|orbit|maple|cloud|happy|daily|lumen"
_ENDINGS = "com|com|com|net|org|info|cn|jp|co.kr|ru|de|fr|io|example"

KINDS = {"words": 0.5, "random": 0.14, "copyright": 0.12, "url": 0.1, "digits": 0.07, "date": 0.07}
"""Kind of content -> its share."""


def draw_text(rng: np.random.Generator, script: str, *, kind: str | None = None) -> tuple[str, str]:
    """One line of text, and its kind.

    Args:
        script: one of `SCRIPTS`. Addresses and digits are the same in all.
        kind: one of `KINDS`; None draws it by their shares.

    Raises:
        ValueError: a script or kind that does not exist.
    """
    if script not in WORDS:
        raise ValueError(f"script must be one of {', '.join(SCRIPTS)}, got {script!r}")
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values()))) if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    write = {
        "words": _words,
        "random": _random,
        "copyright": _copyright,
        "url": lambda rng, script: _url(rng),
        "digits": lambda rng, script: _digits(rng),
        "date": _date,
    }[kind]
    return write(rng, script), kind


def _pick(rng: np.random.Generator, items: str | list[str]) -> str:
    items = items.split("|") if isinstance(items, str) else items
    return items[rng.integers(len(items))]


def _words(rng: np.random.Generator, script: str) -> str:
    phrases = [_pick(rng, _WORDS[script]) for _ in range(rng.choice([1, 2, 3, 4], p=[0.6, 0.25, 0.1, 0.05]))]
    while len(phrases) > 1 and sum(map(len, phrases)) > (28 if script in SPACED else 12):
        phrases.pop()
    text = (" " if script in SPACED else "").join(phrases)
    return _pick(rng, [text, text.upper(), text.upper(), text.title(), text.capitalize()])


def _random(rng: np.random.Generator, script: str) -> str:
    letters = _LETTERS[script]
    text = "".join(letters[i] for i in rng.integers(len(letters), size=rng.integers(2, 9)))
    # A break in the middle, where the script has spaces.
    middle = len(text) // 2
    return f"{text[:middle]} {text[middle:]}" if script in SPACED and len(text) > 5 and rng.random() < 0.5 else text


def _copyright(rng: np.random.Generator, script: str) -> str:
    name = _pick(rng, _NAMES) if rng.random() < 0.4 else _pick(rng, _WORDS[script])
    year = rng.integers(1995, 2031)
    return _pick(rng, [f"© {year} {name}", f"©{name}", f"© {name} {year}", f"(c) {year} {name}", f"{name}®"])


def _url(rng: np.random.Generator) -> str:
    site = _pick(rng, _SITES) + _pick(rng, ["", "", "-"]) + _pick(rng, _SITES)
    address = f"{site}.{_pick(rng, _ENDINGS)}"
    forms = [address, f"www.{address}", f"https://{address}", f"{address}/{rng.integers(10**6)}"]
    return _pick(rng, [*forms, f"@{site}", f"info@{address}", address.upper()])


def _digits(rng: np.random.Generator) -> str:
    number = "".join(str(digit) for digit in rng.integers(10, size=rng.integers(3, 11)))
    return _pick(rng, [number, f"#{number}", f"No. {number}", f"{number[:3]}-{number[3:]}" if number[3:] else number])


def _date(rng: np.random.Generator, script: str) -> str:
    year, month, day = (int(rng.integers(*ends)) for ends in ((1995, 2031), (1, 13), (1, 29)))
    forms = [f"{year}-{month:02}-{day:02}", f"{day:02}.{month:02}.{year}", f"{month:02}/{day:02}/{year}"]
    if script in ("chinese", "japanese"):
        forms.append(f"{year}年{month}月{day}日")
    if script == "korean":
        forms.append(f"{year}년 {month}월 {day}일")
    return _pick(rng, [*forms, f"{forms[0]} {rng.integers(24):02}:{rng.integers(60):02}"])
