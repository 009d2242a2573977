"""Generated questions that a small language model answers, and that the models that calculate do not.

A rule accepts the right replies: they name the fact, or have the form that was asked for. The demo streams these
questions together with those of tasks.py. docs/benchmarks/models-and-demo.md has the share of right answers by kind.
"""

import random
import re
from collections.abc import Callable

from assets.tasks import Task, draw

KINDS = ("capital", "continent", "opposite", "plural", "sentence")
LEVEL = "talk"
MODEL = "general"  # the language model of the default portfolio


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """What is asked for, and what the answer names: regular expressions of which one suffices."""
    return tuple(
        (asked.strip(), answer)
        for asked, _, answer in (line.partition("=") for line in text.split(","))
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CAPITALS = _pairs(
    "Argentina=Buenos Aires,Australia=Canberra,Austria=Vienna,Belgium=Brussels,Bolivia=La Paz|Sucre,Bulgaria=Sofia,"
    "Canada=Ottawa,Chile=Santiago,China=Beijing,Colombia=Bogot,Croatia=Zagreb,Cuba=Havana,Denmark=Copenhagen,"
    "Ecuador=Quito,Egypt=Cairo,England=London,Ethiopia=Addis Ababa,Finland=Helsinki,France=Paris,Germany=Berlin,"
    "Ghana=Accra,Greece=Athens,Hungary=Budapest,Iceland=Reykjav,India=Delhi,Indonesia=Jakarta,Iran=Tehran,"
    "Iraq=Baghdad,Ireland=Dublin,Israel=Jerusalem,Italy=Rome,Jamaica=Kingston,Japan=Tokyo,Jordan=Amman,Kenya=Nairobi,"
    "Lebanon=Beirut,Malaysia=Kuala Lumpur,Mexico=Mexico City,Mongolia=Ulaan,Morocco=Rabat,Nepal=Kathmandu,Norway=Oslo,"
    "Pakistan=Islamabad,Peru=Lima,Poland=Warsaw,Portugal=Lisbon,Romania=Bucharest,Russia=Moscow,Scotland=Edinburgh,"
    "Senegal=Dakar,Serbia=Belgrade,Slovakia=Bratislava,South Korea=Seoul,Spain=Madrid,Sweden=Stockholm,"
    "Switzerland=Bern,Thailand=Bangkok,Tunisia=Tunis,Turkey=Ankara,Uganda=Kampala,Ukraine=Kiev|Kyiv,Vietnam=Hanoi"
)
CONTINENTS = _pairs(
    "Algeria=Africa,Angola=Africa,Argentina=America,Austria=Europe,Bangladesh=Asia,Belgium=Europe,Bolivia=America,"
    "Brazil=America,Cambodia=Asia,Cameroon=Africa,Canada=America,Chile=America,China=Asia,Colombia=America,"
    "Croatia=Europe,Cuba=America,Denmark=Europe,Ecuador=America,Egypt=Africa,Ethiopia=Africa,Finland=Europe,"
    "France=Europe,Germany=Europe,Ghana=Africa,Greece=Europe,Guatemala=America,Hungary=Europe,India=Asia,"
    "Indonesia=Asia,Iran=Asia,Ireland=Europe,Italy=Europe,Japan=Asia,Kenya=Africa,Laos=Asia,Libya=Africa,"
    "Malaysia=Asia,Mali=Africa,Mexico=America,Mongolia=Asia,Morocco=Africa,Nepal=Asia,Nigeria=Africa,Norway=Europe,"
    "Pakistan=Asia,Paraguay=America,Peru=America,Poland=Europe,Portugal=Europe,Romania=Europe,Senegal=Africa,"
    "South Korea=Asia,Spain=Europe,Sudan=Africa,Sweden=Europe,Thailand=Asia,Uganda=Africa,Uruguay=America,"
    "Venezuela=America,Vietnam=Asia,Zambia=Africa,Zimbabwe=Africa"
)
OPPOSITES = _pairs(
    "always=never,arrive=leave|depart,asleep=awake,begin=end|finish|stop,big=small|little,black=white,"
    "brave=coward|afraid|timid|fear,buy=sell,cheap=expensive,clean=dirty|unclean,cold=hot|warm,dark=light|bright,"
    "day=night,dead=alive|living,deep=shallow,difficult=easy,dry=wet,early=late,east=west,empty=full,false=true,"
    "far=near|close,fast=slow,first=last,float=sink,forget=remember,friend=enemy|foe,future=past,good=bad|evil,"
    "happy=sad|unhappy,hard=soft|easy,heavy=light,high=low,hot=cold,inside=outside,laugh=cry,left=right,long=short,"
    "lose=win|find,loud=quiet|silent|soft,love=hate,narrow=wide|broad,near=far|distant,new=old,night=day,north=south,"
    "old=young|new,open=close,peace=war|conflict,poor=rich|wealthy,push=pull,quiet=loud|noisy,rich=poor,rise=fall,"
    "safe=danger|unsafe,short=long|tall,slow=fast|quick,strong=weak,success=fail,summer=winter,sweet=sour|bitter,"
    "tall=short,thick=thin,top=bottom,true=false,up=down,weak=strong,wet=dry,white=black,wide=narrow,win=lose|loss,"
    "winter=summer,wrong=right,young=old"
)
PLURALS = _pairs(
    "apple=apples,baby=babies,bag=bags,bed=beds,bird=birds,boat=boats,book=books,bottle=bottles,box=boxes,boy=boys,"
    "bridge=bridges,brush=brushes,bus=buses,car=cars,cat=cats,chair=chairs,child=children,church=churches,"
    "city=cities,clock=clocks,country=countries,cup=cups,day=days,desk=desks,dish=dishes,dog=dogs,door=doors,"
    "farm=farms,flower=flowers,foot=feet,fox=foxes,friend=friends,game=games,garden=gardens,girl=girls,glass=glasses,"
    "goose=geese,hand=hands,horse=horses,house=houses,idea=ideas,island=islands,key=keys,knife=knives,lady=ladies,"
    "lake=lakes,leaf=leaves,loaf=loaves,man=men,mouse=mice,night=nights,party=parties,pencil=pencils,"
    "person=people,plate=plates,river=rivers,road=roads,school=schools,shelf=shelves,shoe=shoes,story=stories,"
    "table=tables,tooth=teeth,toy=toys,train=trains,tree=trees,watch=watches,window=windows,wolf=wolves,woman=women"
)
WORDS = _words(
    "apple bicycle bird book bread bridge candle castle chair child city cloud coffee doctor door dream farmer fire "
    "flower forest friend garden guitar hat horse house island kitchen lake lamp market mirror moon morning mountain "
    "museum music ocean painter park piano rain river road school ship shoe snow song star storm street student "
    "summer sun table teacher train tree village wind window winter"
)


def make_talk(
    rng: random.Random, kind: str | None = None, reserved: bool = False
) -> Task:
    """Draw a question of a kind, by default of a random one; see tasks.make_task."""
    return draw(rng, _MAKERS[kind or rng.choice(KINDS)], reserved)


def _named(
    rng: random.Random,
    kind: str,
    pairs: tuple[tuple[str, str], ...],
    forms: tuple[str, ...],
) -> Task:
    """A question for what one of these pairs says; the reply has it as a word, or as the beginning of a word."""
    asked, answer = rng.choice(pairs)
    end = r"\b" if kind in ("opposite", "plural") else ""
    return Task(
        kind,
        rng.choice(forms).format(asked),
        answer.partition("|")[0],
        text=asked,
        rule=rf".*\b(?:{answer}){end}.*",
    )


def _capital(rng: random.Random) -> Task:
    forms = (
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "What is the name of the capital of {}?",
    )
    return _named(rng, "capital", CAPITALS, forms)


def _continent(rng: random.Random) -> Task:
    forms = (
        "Which continent does {} belong to?",
        "On which continent does {} lie?",
        "{} is a country on which continent?",
    )
    return _named(rng, "continent", CONTINENTS, forms)


def _opposite(rng: random.Random) -> Task:
    forms = (
        'Give the opposite of the word "{}".',
        "Name a word that means the opposite of {}.",
        'What is the antonym of "{}"?',
    )
    return _named(rng, "opposite", OPPOSITES, forms)


def _plural(rng: random.Random) -> Task:
    forms = (
        "What is the plural of {}?",
        "Give the plural of the noun {}.",
        'What is the plural form of the noun "{}"?',
    )
    return _named(rng, "plural", PLURALS, forms)


def _sentence(rng: random.Random) -> Task:
    word = rng.choice(WORDS)
    form = rng.choice(
        (
            "Use {} in a sentence.",
            "Make a short sentence with the noun {}.",
            "Say one sentence about a {}.",
        )
    )
    return Task(
        "sentence",
        form.format(word),
        word,
        text=word,
        # four to forty words and a full stop, among them the word or its plural
        rule=rf"(?=.*\b{re.escape(word)}(?:s|es)?\b)(?:\S+\s+){{3,39}}\S+[.!?]\W?",
    )


_MAKERS: dict[str, Callable[[random.Random], Task]] = {
    "capital": _capital,
    "continent": _continent,
    "opposite": _opposite,
    "plural": _plural,
    "sentence": _sentence,
}
